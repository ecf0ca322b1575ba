"""The deletion service: requests, their ledger, the durable work on them, and the API."""
