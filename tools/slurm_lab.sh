#!/usr/bin/env bash
# A real Slurm cluster on this machine: N nodes, each in a network namespace of its own, with fake GPUs or its real ones.
#
#   slurm_lab.sh up              start it (about a second); `. STATE/env` then makes sbatch, srun, squeue talk to it
#   slurm_lab.sh down            end every process of it by its id, remove namespaces, bridge and STATE
#   slurm_lab.sh status          nodes and jobs
#   slurm_lab.sh pids N          processes of node N
#   slurm_lab.sh kill-node N     power loss: every process of node N, slurmd included
#   slurm_lab.sh start-node N    and back
#   slurm_lab.sh cut-node N      node N loses the network, its processes run on; join-node N heals it
#   slurm_lab.sh full-disk N DIR a file system of node N's own, without a free byte, over the existing folder DIR
#   slurm_lab.sh restart-controller
#
# Environment: LAB_STATE   folder of this lab (below 60 characters: sockets live in it), required
#              LAB_NODES   2      LAB_GPUS 8      LAB_CPUS 64      LAB_PROC linuxproc | cgroup
#              LAB_DEAL  0        1: this machine's GPUs are dealt to the nodes, LAB_GPUS each, by CUDA's numbers. Then nodes are
#                                 hosts of their own to NCCL, with sockets between them, and every task of a job has
#                                 MULTICAST_OFF below, whatever sbatch was told to export
#              LAB_NET   namespaces | ports: nodes are ports of 127.0.0.1, where no namespace can be made; up, down and
#                                 status only
#              LAB_FIRST_JOB 1    number of the first job; a run that goes on in another lab must not meet its own again
# Partitions:  main   preempts the others; DOWN is noticed after 10 s, a requeued job may start again after 5 s
#              low    preempted at once       graced   preempted with a notice of 90 s
# Needs root and: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2
# There is no accounting database: STATE/bin/sacct answers submitit's question from the controller's memory.
set -euo pipefail

S=${LAB_STATE:?LAB_STATE is not set: the folder of this lab}
[ ${#S} -le 60 ] || { echo "slurm_lab: LAB_STATE=$S has ${#S} characters; allowed: 60" >&2; exit 2; }
NODES=${LAB_NODES:-2} GPUS=${LAB_GPUS:-8} CPUS=${LAB_CPUS:-64} PROC=${LAB_PROC:-linuxproc}
DEAL=${LAB_DEAL:-0} NET=${LAB_NET:-namespaces}
case $DEAL:$NET in
  [01]:namespaces | [01]:ports) ;;
  *) echo "slurm_lab: LAB_DEAL=$DEAL LAB_NET=$NET; allowed: LAB_DEAL 0 or 1, LAB_NET namespaces or ports" >&2; exit 2;;
esac
# NVLink multicast of a process that dies can take GPUs out of service for everybody.
MULTICAST_OFF="NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1"
if [ -r "$S/settings" ]; then . "$S/settings"; fi

# Names, subnet and ports follow from the folder, so that several labs can run side by side.
NUMBER=$((0x$(printf %s "$S" | sha256sum | cut -c1-6)))
TAG=lab$(printf %05x $((NUMBER % 0xfffff)))
SUBNET=10.$((128 + NUMBER % 64)).$((NUMBER / 64 % 250))
PORT=$((20000 + NUMBER % 1000 * 10))
CONF=$S/slurm.conf

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
namespace() { echo "$TAG-node$1"; }
controller() { [ "$NET" = ports ] && echo 127.0.0.1 || echo "$SUBNET.1"; }
address() { [ "$NET" = ports ] && echo 127.0.0.1 || echo "$SUBNET.$((10 + $1))"; }
port() { [ "$NET" = ports ] && echo $((PORT + 2 + $1)) || echo $((PORT + 2)); }
every_node() { seq "$NODES"; }

end() {  # pid file: ask, wait, insist
  local pid; [ -s "$1" ] || return 0; pid=$(cat "$1")
  kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
  rm -f "$1"
}

check_gpus() {  # LAB_DEAL=1: are there as many as are dealt?
  [ "$DEAL" = 1 ] || return 0
  local there; there=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)
  [ "$there" -ge $((NODES * GPUS)) ] || {
    echo "slurm_lab: LAB_DEAL=1 with LAB_NODES=$NODES x LAB_GPUS=$GPUS: this machine has $there GPUs (nvidia-smi -L)" >&2; exit 2; }
}

node_pids() { ip netns pids "$(namespace "$1")" 2>/dev/null || true; }
kill_node() {
  if [ "$NET" = ports ]; then end "$S/slurmd-node$1.pid"; return; fi
  local pid; for pid in $(node_pids "$1"); do kill -KILL "$pid" 2>/dev/null || true; done
  for _ in $(seq 50); do [ -z "$(node_pids "$1")" ] && break; sleep 0.1; done
  rm -f "$S/slurmd-node$1.pid"
}

end_jobs() {  # of nodes that are ports: their processes are known to slurmd alone
  SLURM_CONF=$CONF timeout 20 scancel --user="$(id -un)" 2> /dev/null || true
  for _ in $(seq 100); do [ -n "$(SLURM_CONF=$CONF timeout 5 squeue -h 2> /dev/null)" ] || break; sleep 0.2; done
}

write_configuration() {
  local n nodes=""
  mkdir -p "$S"/{bin,controller,dev,log,munge}
  chmod 755 "$S"; chmod 700 "$S/munge"
  printf 'NODES=%s GPUS=%s CPUS=%s PROC=%s DEAL=%s NET=%s\n' "$NODES" "$GPUS" "$CPUS" "$PROC" "$DEAL" "$NET" > "$S/settings"
  printf 'export SLURM_CONF=%s PATH=%s/bin:$PATH\n' "$CONF" "$S" > "$S/env"
  mkdir -p "$S/socket"; chmod 755 "$S/socket"
  head -c 1024 /dev/urandom > "$S/munge/key"; chmod 400 "$S/munge/key"
  for n in $(seq 0 $((GPUS - 1))); do mknod -m 666 "$S/dev/gpu$n" c 1 3; done
  printf '127.0.0.1 localhost\n%s controller\n' "$(controller)" > "$S/hosts"
  for n in $(every_node); do
    mkdir -p "$S/spool/node$n"
    printf '%s node%s\n' "$(address "$n")" "$n" >> "$S/hosts"
    local host=""
    printf 'NodeName=node%s Name=gpu File=%s/dev/gpu[0-%s]\n' "$n" "$S" $((GPUS - 1)) >> "$S/gres.conf"
    [ "$NET" = namespaces ] || host="NodeHostname=$(hostname) "
    nodes+="NodeName=node$n ${host}NodeAddr=$(address "$n") Port=$(port "$n") CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=65536 Gres=gpu:$GPUS"$'\n'
  done
  printf 'CgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nCgroupPlugin=cgroup/v1\n' > "$S/cgroup.conf"
  cat > "$CONF" <<END
ClusterName=$TAG
SlurmctldHost=$(hostname)($(controller))
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$S/socket/munge,cred_expire=5
CredType=cred/munge
FirstJobId=${LAB_FIRST_JOB:-1}
StateSaveLocation=$S/controller
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/slurmctld.pid
SlurmdPidFile=$S/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
ProctrackType=proctrack/$PROC
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
UnkillableStepTimeout=30
SlurmdTimeout=10
SlurmctldTimeout=30
MinJobAge=86400
MessageTimeout=10
AccountingStorageType=accounting_storage/none
${nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=graced Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
END
  if [ "$DEAL" = 1 ]; then  # before every task, the job script included; what it prints is the task's environment
    cat > "$S/bin/task_prolog" <<END
#!/bin/sh
for pair in $MULTICAST_OFF NCCL_HOSTID=\$SLURMD_NODENAME; do echo "export \$pair"; done
# Slurm counts every node's GPUs from 0, whatever their files are called.
gpus= IFS=,
for gpu in \$CUDA_VISIBLE_DEVICES; do gpus=\$gpus,\$((gpu + $GPUS * (\${SLURMD_NODENAME#node} - 1))); done
[ -z "\$gpus" ] || echo "export CUDA_VISIBLE_DEVICES=\${gpus#,}"
END
    chmod +x "$S/bin/task_prolog"
    echo "TaskProlog=$S/bin/task_prolog" >> "$CONF"
  fi
  cat > "$S/bin/sacct" <<'END'
#!/usr/bin/env bash
# What submitit asks, `sacct -o JobID,State,NodeList --parsable2 -j ID ...`, answered by the controller.
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then
    shift
    scontrol -o show job "$1" 2>/dev/null | sed -nE 's/^JobId=([0-9]+).* JobState=([A-Z_]+).* NodeList=(\S+).*/\1|\2|\3/p'
  fi
  shift
done
END
  chmod +x "$S/bin/sacct"
}

start_network() {
  local n
  [ "$NET" = namespaces ] || return 0
  ip link show "$TAG" > /dev/null 2>&1 || { ip link add "$TAG" type bridge; ip addr add "$SUBNET.1/24" dev "$TAG"; }
  ip link set "$TAG" up
  for n in $(every_node); do
    ip netns add "$(namespace "$n")"
    ip link add "$TAG-$n" type veth peer name eth0 netns "$(namespace "$n")"
    ip link set "$TAG-$n" master "$TAG" up
    ip -n "$(namespace "$n")" addr add "$(address "$n")/24" dev eth0
    ip -n "$(namespace "$n")" link set lo up
    ip -n "$(namespace "$n")" link set eth0 up
  done
}

start_node() {
  if [ "$NET" = ports ]; then slurmd -N "node$1" -f "$CONF"; return; fi
  # `ip netns exec` would mount a /sys without cgroups. Own host name and /etc/hosts: a UTS and a mount namespace.
  nsenter --net="/run/netns/$(namespace "$1")" unshare --uts --mount --propagation private \
    bash -c 'hostname "$1"; mount --bind "$2" /etc/hosts; exec slurmd -N "$1" -f "$3"' _ "node$1" "$S/hosts" "$CONF"
}

idle_nodes() { SLURM_CONF=$CONF timeout 5 sinfo -h -N -p main -o %t 2>/dev/null | grep -cE '^(idle|mix|alloc)$' || true; }

case ${1:-} in
  up)
    check_gpus
    [ ! -e "$S/settings" ] || { echo "slurm_lab: $S is in use; run 'down' first" >&2; exit 2; }
    write_configuration
    start_network
    munged --force --key-file="$S/munge/key" --socket="$S/socket/munge" --pid-file="$S/munged.pid" \
      --log-file="$S/log/munged.log" --seed-file="$S/munge/seed" --num-threads=2 2>> "$S/log/munged.err"
    slurmctld -f "$CONF"
    for n in $(every_node); do start_node "$n"; done
    for _ in $(seq 150); do
      if [ "$(idle_nodes)" = "$NODES" ]; then exit 0; fi
      sleep 0.2
    done
    tail -n 5 "$S/log/slurmctld.log" >&2
    echo "slurm_lab: not all nodes came up; see $S/log" >&2
    exit 1;;
  down)
    if [ "$NET" = ports ]; then end_jobs; fi
    for n in $(every_node); do kill_node "$n"; done
    end "$S/slurmctld.pid"
    end "$S/munged.pid"
    for n in $(every_node); do
      ip netns del "$(namespace "$n")" 2> /dev/null || true
      ip link del "$TAG-$n" 2> /dev/null || true
    done
    ip link del "$TAG" 2> /dev/null || true
    rm -rf "$S";;
  status) SLURM_CONF=$CONF sinfo -N -p main -o '%N %t %G %E'; SLURM_CONF=$CONF squeue;;  # once a node, not once a partition
  pids) node_pids "$2";;
  kill-node) kill_node "$2";;
  start-node) start_node "$2";;
  cut-node) ip link set "$TAG-$2" down;;
  join-node) ip link set "$TAG-$2" up;;
  full-disk)
    nsenter --mount --target "$(cat "$S/slurmd-node$2.pid")" \
      sh -c 'mount -t tmpfs -o size=64k tmpfs "$1"; cat /dev/zero > "$1/full" 2> /dev/null || true' _ "$3";;
  restart-controller)
    end "$S/slurmctld.pid"
    sleep 1
    slurmctld -f "$CONF"
    for _ in $(seq 150); do
      if [ "$(idle_nodes)" = "$NODES" ]; then exit 0; fi
      sleep 0.2
    done
    exit 1;;
  *) sed -n '2,25s/^# \{0,1\}//p' "$0"; exit 2;;
esac
