"""One description of any model: its config, its modules and shapes, its memory."""
