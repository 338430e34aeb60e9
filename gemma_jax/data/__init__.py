"""Records to batches: tokenizer, templates, records, examples, row plan."""
