"""A base model as it lies on disk: its name and files, its description, its weights one by one."""
