"""Text and tokens: tokenizer, chat templates, rendering of conversations, parsing of what a model wrote."""
