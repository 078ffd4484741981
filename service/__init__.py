"""The gateway: speaks OpenAI to clients, tokens to workers."""
