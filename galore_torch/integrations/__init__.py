"""Thin bridges to the trainers that people use. Each needs its library, which is imported where it is used."""
