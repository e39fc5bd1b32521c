# On-policy distillation: a trained tiny model, in FP8, teaches one that has seen a few supervised steps. No reward counts.

make train-tiny-fp8 ARGS="--run.name teacher"
.venv/bin/fp8slurm convert torch-dist-to-hf runs/teacher/checkpoints/step_000060 models/tiny-teacher --origin-hf-dir models/tiny
.venv/bin/fp8slurm convert hf-to-fp8 models/tiny-teacher models/tiny-teacher-FP8
make train-tiny-fp8 ARGS="--run.name student --teacher.checkpoint models/tiny-teacher-FP8 --algorithm.advantage none --rollout.no-drop-no-signal --rollout.n-samples 1 --rollout.prompts-per-step 256"
