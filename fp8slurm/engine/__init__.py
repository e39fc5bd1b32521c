"""The SGLang server as a child process, its client, and the pool that hands prompts out. Runs in the rollout worker, but for inside/."""
