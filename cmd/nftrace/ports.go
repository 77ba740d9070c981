package main

import "github.com/nftrace/nftrace/pkg/symbolize"

// maxUnnamed is how many ports are remembered that have no name that anybody knows.
const maxUnnamed = 1 << 14

// port is a bridge's port.
type port struct {
	netns uint32
	index int
}

// ports asks for the names of bridges' ports that no record names. It remembers those of which it
// got none, not to ask for each packet.
type ports struct {
	ask     func(port) (string, error)
	unnamed map[port]bool
}

func newPorts(sys *symbolize.System) *ports {
	return &ports{unnamed: map[port]bool{}, ask: func(p port) (string, error) {
		ns, err := sys.NamespaceByInode(p.netns)
		if err != nil {
			return "", err
		}
		return ns.LinkName(p.index)
	}}
}

// name is "" where nobody knows it.
func (s *ports) name(netns uint32, index int) string {
	p := port{netns, index}
	if s.unnamed[p] {
		return ""
	}
	name, err := s.ask(p)
	if err != nil || name == "" {
		if len(s.unnamed) >= maxUnnamed {
			clear(s.unnamed)
		}
		s.unnamed[p] = true
		return ""
	}
	return name
}
