"""The ground floor: errors, bytes, frozen values, and the language that models are described in."""
