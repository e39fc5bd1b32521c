# On-policy distillation: a trained tiny model, in FP8, teaches one that has seen a few supervised steps. No reward counts.

make train-tiny-fp8 ARGS="--run.name teacher"
.venv/bin/fp8slurm export runs/teacher models/tiny-teacher-FP8 --fp8
make train-tiny-fp8 ARGS="--run.name student --teacher.checkpoint models/tiny-teacher-FP8 --algorithm.advantage none --rollout.no-drop-no-signal --rollout.n-samples 1 --rollout.prompts-per-step 256"
