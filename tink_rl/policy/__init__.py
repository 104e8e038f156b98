"""What a policy version is, as plain data: the adapter, the packet, the base fingerprint."""
