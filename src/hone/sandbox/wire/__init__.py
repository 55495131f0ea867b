"""What clients and nodes say to one another, over connections that may break."""
