#!/usr/bin/env bash
# How an Envoy goes without breaking a stream: run it before SIGTERM, after which Envoy is gone at once.
# It needs nothing but bash, since Envoy's image has no curl. The chart runs it as preStop.
#
#   drain.sh SECONDS [ADMIN_PORT]
#
# Connections that answer are told to go elsewhere (GOAWAY), new ones are taken until --drain-time-s is
# over, and it ends when no request is left, after SECONDS at most.
set -uo pipefail
seconds=$1 admin=${2:-9901}
least=10 # for all who send requests here to notice that others should get them

ask() { # METHOD PATH
  exec 3<>"/dev/tcp/127.0.0.1/$admin" || return
  printf '%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
}

active() { # the requests that run; of a gRPC stream, the one that opened it
  ask GET '/stats?filter=^http.grpc.downstream_rq_active$' | grep -oE 'downstream_rq_active: [0-9]+' | grep -oE '[0-9]+'
}

ask POST '/drain_listeners?inboundonly&graceful&skip_exit' >/dev/null
while ((SECONDS < seconds)); do
  ((SECONDS >= least)) && [[ $(active) == 0 ]] && break
  sleep 1
done
