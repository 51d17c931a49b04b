"""The messages of proto/*.proto, for the server and for the client. `make proto` writes all other files here."""
