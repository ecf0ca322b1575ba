"""The deletion service: requests come in, weights and certificates go out, and nothing is lost between.

A request is a row whose state only moves along `states.NEXT`; each move writes its history and an entry of
the ledger in the same transaction. Durable workflows (DBOS, in the same database) carry requests from one
state to the next; every step can be run twice with the same result.
"""
