"""What another user of the node can do to a running job: run as that user, prints one JSON object.

    stranger.py RUN_DIR STORE_PORT ENGINE_PORT PIDS [forge]

The ports are handed over; a scan finds them. forge: also write into the job's store that a notice of its end has come,
and commands for the rollout workers.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path


def http(port: int, path: str, body: dict | None, key: str | None = None) -> int | str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method="GET" if body is None else "POST")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return str(error)


def readable(path: Path) -> bool:
    try:
        if path.is_dir():
            os.listdir(path)
        else:
            with open(path, "rb") as file:
                file.read(1)
        return True
    except OSError:
        return False


def command_in_flight(store) -> tuple[str, int]:
    """The prefix of the job's keys and the number of a command that is not answered yet: an answered one is deleted."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for key in store.list_keys():
            prefix, command, number = key.partition("command/")
            if command and number.isdigit():
                return prefix, int(number)
        time.sleep(0.01)
    raise SystemExit("no command was seen in the store")


def main() -> None:
    run, store_port, engine_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    pids, forge = json.loads(sys.argv[4]), sys.argv[5:] == ["forge"]
    said: dict = {"uid": os.getuid()}

    generate = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}}
    asked = {
        "/generate": generate,
        "/model_info": None,
        "/server_info": None,
        "/begin_weight_update": {},
        "/update_weights_from_disk": {"model_path": "/tmp"},
        "/update_weights_from_tensor": {"serialized_named_tensors": ["gASVAAAAAAAAAAAu"], "load_format": None},
        "/update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": []},
        "/init_weights_update_group": {
            "master_address": "127.0.0.1",
            "master_port": 1,
            "rank_offset": 1,
            "world_size": 2,
        },
        "/get_weights_by_name": {"name": "model.embed_tokens.weight"},
        "/flush_cache": {},
        "/abort_request": {"abort_all": True},
        "/pause_generation": {"mode": "abort"},
        "/release_memory_occupation": {},
        "/openapi.json": None,
        "/v1/completions": {"model": "x", "prompt": "1+1"},
    }
    said["without_key"] = {path: http(engine_port, path, body) for path, body in asked.items()}
    said["wrong_key"] = {path: http(engine_port, path, body, "0" * 64) for path, body in asked.items()}

    process_files = [Path(f"/proc/{pid}") / name for pid in pids for name in ("environ", "mem", "maps", "fd")]
    files = [
        run,
        run / "config.json",
        run / "metrics.jsonl",
        run / "rollouts",
        run / "attempts",
        run / "attempts/0/store.json",
    ]
    said["readable"] = [str(p) for p in [*files, *process_files] if readable(p)]
    said["shared_memory"] = [str(p) for p in Path("/dev/shm").iterdir() if p.stat().st_uid == 0 and readable(p)]
    said["command_lines"] = {
        pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in pids
    }

    # every port of the job that the kernel shows to everybody: something that nobody there expects
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    ours = json.loads(os.environ["JOB_PORTS"])
    said["knocked"] = 0
    for address in listening:
        port = int(address.split(":")[1], 16)
        if port in ours and port != engine_port:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
                s.sendall(b"GET / HTTP/1.0\r\n\r\n")
                said["knocked"] += 1

    import torch.distributed as dist

    store = dist.TCPStore(
        "127.0.0.1", store_port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    keys = store.list_keys()
    said["keys"] = len(keys)
    texts = []
    for key in keys:
        try:
            store.set_timeout(timedelta(seconds=2))
            texts.append(store.get(key).decode(errors="replace"))
        except RuntimeError:
            continue
    said["values"] = texts
    if forge:
        prefix, number = command_in_flight(store)
        store.set(f"{prefix}noticed", "")
        for forged in range(number + 1, number + 40):
            store.set(f"{prefix}command/{forged}", json.dumps({"kind": "stop"}))
        said["forged"] = number + 1
    print(json.dumps(said))


if __name__ == "__main__":
    main()
