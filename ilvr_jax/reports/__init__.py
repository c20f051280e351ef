"""What a person looks at in the end: tables and pictures of results."""
