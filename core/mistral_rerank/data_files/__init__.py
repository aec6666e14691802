"""Files: atomic writes and resumable work, text files as users have them, passages and pairs."""
