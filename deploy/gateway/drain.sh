#!/usr/bin/env bash
# How an Envoy goes without breaking a stream: run it before SIGTERM, at which Envoy is gone at once. It
# needs nothing but bash, since Envoy's image has no curl. The chart runs it as preStop.
#
#   drain.sh SECONDS [ADMIN_PORT]
#
# Every connection that answers is told to go elsewhere (GOAWAY), and who comes all the same is served. It
# ends when no request is left and all who send calls here have had time to notice that others should
# get them; after SECONDS at most.
set -uo pipefail
seconds=$1 admin=${2:-9901}
notice=10

ask() { # METHOD PATH
  exec 3<>"/dev/tcp/127.0.0.1/$admin" || return
  printf '%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
}

active() { # streams that run
  ask GET '/stats?filter=^http.grpc.downstream_rq_active$' | grep -oE 'downstream_rq_active: [0-9]+' | grep -oE '[0-9]+'
}

ask POST '/drain_listeners?inboundonly&graceful&skip_exit' >/dev/null
sleep "$((notice < seconds ? notice : seconds))"
while ((SECONDS < seconds)) && [[ $(active) != 0 ]]; do
  sleep 1
done
