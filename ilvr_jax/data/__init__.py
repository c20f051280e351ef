"""Reading, generating and batching records: everything between a file and a Batch."""
