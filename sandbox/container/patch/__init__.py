"""What a session changed, as a patch: found, made, read again, and applied. D4"""
