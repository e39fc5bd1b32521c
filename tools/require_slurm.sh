#!/usr/bin/env bash
# require_slurm.sh TARGET RECIPE cpu|gpu: what a Slurm target of the Makefile needs, asked before anything is built.
# Exit status 2 and what to do where it is not there. HF_CHECKPOINT, PROMPT_DATA, EVAL_DATA, ARGS, FP8SLURM and
# VENV are the Makefile's.
set -uo pipefail
target=$1 recipe=$2 kind=$3

refuse() { printf 'make %s: %s\n' "$target" "$1" >&2; exit 2; }

elsewhere="Run it on a login node of your cluster."
[ "$kind" = gpu ] && elsewhere="$elsewhere Without Slurm, on a machine with the GPUs: \
fp8slurm train --recipe $recipe --slurm.executor local."
elsewhere="$elsewhere Without Slurm and GPUs: make train-tiny-fp8 runs the whole loop on this machine."

for command in sbatch srun squeue sinfo; do
    command -v "$command" > /dev/null ||
        refuse "it queues Slurm jobs, and there is no $command on this machine. $elsewhere"
done
if ! nodes=$(timeout 20 sinfo --noheader --format=%G 2>&1); then
    refuse "Slurm does not answer ($(printf %s "$nodes" | tail -n 1)). $elsewhere"
fi
if [ "$kind" = gpu ] && ! grep -q gpu <<< "$nodes"; then
    refuse "this Slurm cluster has no node with GPUs (sinfo --format=%G). Without GPUs: make all-tiny-fp8, \
or make train-tiny-fp8."
fi

for name in HF_CHECKPOINT PROMPT_DATA EVAL_DATA; do
    path=${!name:-}
    [ -z "$path" ] || [ -e "$path" ] || refuse "$name=$path: there is no such path."
done
given() { # VARIABLE FLAG ALIAS KEY WHAT: by a variable, by ARGS, or where the recipe says
    local default
    [ -n "${!1:-}" ] && return
    case " ${ARGS:-}" in *" --$2"[\ =]* | *" --$3"[\ =]*) return ;; esac
    default=$(sed -n "s/^$4 = \"\(.*\)\"/\1/p" "fp8slurm/config/recipes/$recipe.toml")
    [ -n "$default" ] && [ -e "$default" ] ||
        refuse "give the $5 with $1=PATH (the recipe's ${default:-path} is not here)."
}
if [ "$kind" = gpu ]; then
    given HF_CHECKPOINT model.hf-checkpoint hf-checkpoint hf_checkpoint "Hugging Face folder of the model in BF16"
    given PROMPT_DATA data.train prompt-data train "JSONL or parquet file of the training prompts"
    given EVAL_DATA data.eval eval-data eval "JSONL or parquet file of the held-out prompts"
fi
if [ "$kind" = gpu ] && [ -z "${FP8SLURM:-}" ]; then
    case " ${ARGS:-}" in
    *" --slurm.container-image"* | *" --fp8.backend"*) ;;
    *) compgen -G "${VENV:-.venv}/lib/python3*/site-packages/transformer_engine" > /dev/null || refuse \
        "training on GPUs needs an environment with TransformerEngine, which ${VENV:-.venv} has not: give yours with \
FP8SLURM=/path/to/bin/fp8slurm, or a container with ARGS=\"--slurm.container-image IMAGE\" (docs/install.md)." ;;
    esac
fi
exit 0
