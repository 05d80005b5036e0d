"""The paper's algorithm in plain lines, for readers and as the tests' oracle: it shares no code with the package."""
