"""The rollout worker: a node's engines, what they generate, what the samples are worth. Runs in the rollout worker; its channel has an end
in every training rank."""
