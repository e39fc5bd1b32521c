"""The rollout worker: a node's engines, what they generate, what it is worth; and the channel to the training ranks."""
