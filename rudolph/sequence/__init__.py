"""Token sequences: layout, vocabulary, attention masks, tasks, text cleaning and tokenizer."""
