"""The Gradio app: a page that transcribes recordings and live speech, and collects feedback."""
