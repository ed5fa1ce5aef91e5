"""How vLLM serves a converted checkpoint: a plugin that it finds by its entry point."""
