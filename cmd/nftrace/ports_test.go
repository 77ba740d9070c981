package main

import (
	"errors"
	"testing"

	"github.com/nftrace/nftrace/pkg/symbolize"
)

// A port is not asked for again that has no name.
func TestPorts(t *testing.T) {
	asked := map[port]int{}
	s := &ports{unnamed: map[port]bool{}, ask: func(p port) (string, error) {
		asked[p]++
		if p.netns == 1 {
			return "vethc1", nil
		}
		return "", errors.New("gone")
	}}
	for range 3 {
		if name := s.name(1, 7); name != "vethc1" {
			t.Errorf("got %q", name)
		}
		if name := s.name(2, 7); name != "" {
			t.Errorf("got %q", name)
		}
	}
	if n := asked[port{2, 7}]; n != 1 {
		t.Errorf("asked %d times for what is not there", n)
	}
}

func TestPortsOfThisNamespace(t *testing.T) {
	sys, err := symbolize.NewSystem()
	if err != nil {
		t.Fatal(err)
	}
	s := newPorts(sys)
	if name := s.name(sys.OwnNamespace().Inode, 1); name != "lo" {
		t.Errorf("interface 1 is %q", name)
	}
	if name := s.name(sys.OwnNamespace().Inode, 1<<30); name != "" {
		t.Errorf("no interface is %q", name)
	}
}
