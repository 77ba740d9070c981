// Package events turns the records that the BPF programs write into typed
// steps, and groups the steps of one packet into one journey. What many packets have in
// common is worked out once, as a Pattern.
//
// It may import package bpf (the record layout) and nothing else of nftrace.
// It runs without root and without a kernel: its tests feed it records.
package events
