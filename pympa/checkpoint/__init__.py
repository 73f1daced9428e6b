"""Model directories: their tensors, their tokenizer, and the refusal of what is broken in them."""
