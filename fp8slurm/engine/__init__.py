"""The SGLang server as a child process, its client, the pool of engines. Runs in rollout workers, inside/ in SGLang."""
