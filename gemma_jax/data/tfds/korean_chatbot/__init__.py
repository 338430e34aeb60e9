"""Korean question and answer pairs from everyday conversation."""

from gemma_jax.data.tfds.korean_chatbot.korean_chatbot import KoreanChatbot

__all__ = ['KoreanChatbot']
