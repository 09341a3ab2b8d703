"""The hosted API's client, as published; only the URL and the key are this server's.

API_URL=http://127.0.0.1:8000/api/v1 API_KEY=... python examples/client.py
"""

import os
import sys

import requests

url = os.environ["API_URL"]
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['API_KEY']}"}
payload = {
    "model": "bytedance/stable-diffusion-xl-lightning",
    "data": {
        "prompt": "futuristic spacecraft",
        "negative_prompt": "blurry, low quality",
        "height": 1024,
        "width": 1024,
        "num_steps": 20,
        "guidance": 7.5,
        "seed": 12345,
    },
}

response = requests.post(url, headers=headers, json=payload)
if not response.ok:
    sys.exit(f"{response.status_code}: {response.text}")
with open("output.png", "wb") as file:
    file.write(response.content)
