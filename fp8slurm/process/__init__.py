"""How a training rank and a rollout worker are put together, and the thread that watches over each."""
