def write_tokenizer(*a): pass
