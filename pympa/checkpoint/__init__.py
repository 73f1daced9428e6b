"""Model directories as people have them: configurations, weights, tokenizers."""
