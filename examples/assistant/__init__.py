"""Two agents of an LLM system on one base: an intent and a reply, trained together."""
