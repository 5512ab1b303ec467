"""How asks and answers travel; `base` is the contract. Modules are imported by name, on demand."""
