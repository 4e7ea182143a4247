"""The proxy's routes: requests that go on to an upstream as they came, and its answers, judged."""
