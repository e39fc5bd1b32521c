"""What lets Megatron and SGLang run without a GPU. Runs in training ranks and inside SGLang's processes."""
