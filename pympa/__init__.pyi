from pympa.session.session import Session as Session

__version__: str
