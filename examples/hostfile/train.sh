#!/bin/bash
# A training on the machines of `hosts`, which ssh reaches without a password; run it on the first of them:
#
#   examples/hostfile/train.sh recipes/dinov2_vitl.py --data.path SURVEY --out RUNS
#
# The repository, its environment, SURVEY and RUNS have the same paths on all machines; RUNS is a folder that they share.
here=$(cd "$(dirname "$0")" && pwd)
# DeepSpeed hands PYTHON*, NCCL* and a few more to the other machines; anything else stands in this file (no comments, no empty lines).
export DS_ENV_FILE=$here/deepspeed_env
# Without it a launcher waits for a machine that is gone as long as TCP does.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
recipe=$1 && shift
exec deepspeed --hostfile "$here/hosts" "$recipe" --train.timeout-minutes 10 "$@"
