"""The review dashboard: Streamlit pages over ``medvlm.results`` and ``medvlm.review``."""
