"""Text that users write and read: files, TOML, escaped text, tables."""
