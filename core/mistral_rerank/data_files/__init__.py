"""Files: atomic writes, resumable work, users' text files, passages and pairs."""
