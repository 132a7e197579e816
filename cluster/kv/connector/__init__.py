"""vLLM's KV connector for pdserve: loaded by vLLM through `kv_connector_module_path`."""

from cluster.kv.connector.connector import PdserveConnector

__all__ = ["PdserveConnector"]
