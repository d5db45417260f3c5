"""The commands, one file a group; nothing heavy is imported before a command runs."""
