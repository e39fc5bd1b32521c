#!/bin/sh
# Whose an environment folder is, and whether it is as the requirements say. In the project's folder:
#
#   environment.sh state VENV    one word:
#       absent    nothing is there: make may build it
#       current   make built it for this folder, from these requirements
#       stale     make built it for this folder, from others or not to the end: make may remove it and build it anew
#       foreign   make built it for another folder: it is taken as it is
#       own       a person, a site or tools/install_gpu.sh built it: it is taken as it is
#       other     something else: make touches nothing
#   environment.sh sum           what make writes into VENV/.complete
#
# The contents of the requirements count: their times are those of a checkout or a copy.
set -eu
FILES="requirements/torch.txt requirements/cpu.txt pyproject.toml"

sum() { cat $FILES 2> /dev/null | cksum; }

ours() {  # make's, for this folder: it lies in it, or says so
  [ -e "$1/.made-by-make" ] || [ -e "$1/.complete" ] || return 1
  case "$(cd "$1" && pwd -P)/" in "$(pwd -P)"/*) return 0;; esac
  [ "$(cat "$1/.made-by-make" 2> /dev/null)" = "$(pwd -P)" ]
}

current() {
  [ -e "$1/.complete" ] || return 1
  if [ -s "$1/.complete" ]; then [ "$(cat "$1/.complete")" = "$(sum)" ]; return; fi
  for file in $FILES; do  # of an earlier make, which left it empty
    if [ "$file" -nt "$1/.complete" ]; then return 1; fi
  done
}

state() {
  if [ ! -e "$1" ] || rmdir "$1" 2> /dev/null; then echo absent
  elif ours "$1"; then if current "$1"; then echo current; else echo stale; fi
  elif [ -x "$1/bin/fp8slurm" ]; then if [ -e "$1/.made-by-make" ]; then echo foreign; else echo own; fi
  else echo other
  fi
}

case ${1:-} in
  state) state "$2";;
  sum) sum;;
  *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2;;
esac
