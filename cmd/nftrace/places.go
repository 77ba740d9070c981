package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/pkg/symbolize"
	"github.com/nftrace/nftrace/pkg/trace"
)

// where is what the user named (interfaces, a container, namespaces) as the probes compare it: inode
// numbers, interface indices and addresses.
type where struct {
	netns  []uint32
	ifaces []trace.Iface
	addrs  []netip.Addr
	links  []namedLink
}

// places looks it up.
func places(ctx context.Context, sys *symbolize.System, c *config) (w where, err error) {
	var within []*symbolize.Namespace
	if c.container != "" {
		ct, err := sys.ResolveContainer(ctx, c.container)
		if err != nil {
			if errors.Is(err, symbolize.ErrNoContainer) {
				err = fmt.Errorf("%w; docker ps (podman ps) lists those that run", err)
			}
			return w, fmt.Errorf("--container %s: %w", c.container, err)
		}
		within = append(within, ct.Netns)
		if len(c.interfaces) == 0 {
			// A packet that is dropped on its way to the container belongs to
			// it too, though it never comes near its interfaces.
			if w.addrs, err = ct.Netns.Addrs(); err != nil {
				return w, fmt.Errorf("--container %s: %w", c.container, err)
			}
			for _, v := range ct.Veths {
				w.ifaces = append(w.ifaces, trace.Iface{Netns: v.Netns.Inode, Index: uint32(v.Outside.Index)})
			}
		}
	}
	for _, spec := range c.netns {
		n, err := sys.ResolveNetns(spec)
		if err != nil {
			if errors.Is(err, symbolize.ErrNoNamespace) {
				err = fmt.Errorf("%w; ip netns lists those with names, lsns -t net all", err)
			}
			return w, fmt.Errorf("--netns %s: %w", spec, err)
		}
		within = append(within, n)
	}
	if len(c.interfaces) == 0 {
		for _, n := range within {
			w.netns = append(w.netns, n.Inode)
		}
		return w, nil
	}
	if len(within) == 0 {
		own, err := sys.ResolveNetns(fmt.Sprintf("pid:%d", pid()))
		if err != nil {
			return w, err
		}
		within = append(within, own)
	}
	for _, name := range c.interfaces {
		found := false
		for _, n := range within {
			all, err := n.Links()
			if err != nil {
				return w, err
			}
			for _, l := range all {
				if l.Name == name {
					found = true
					w.ifaces = append(w.ifaces, trace.Iface{Netns: n.Inode, Index: uint32(l.Index)})
					w.links = append(w.links, namedLink{n, l})
				}
			}
		}
		if !found && name == "any" {
			return w, errors.New("-i any: without -i, packets of every interface are traced; leave it out")
		}
		if !found {
			return w, fmt.Errorf("interface %q does not exist in %s; ip link lists those that do", name, nsNames(within))
		}
	}
	return w, nil
}

// namedLink is an interface that the user asked for by its name.
type namedLink struct {
	ns   *symbolize.Namespace
	link symbolize.Link
}

// linkTick is how often nftrace looks whether the interfaces of -i are there.
const linkTick = time.Second

// watchLinks says which of the interfaces that were asked for are no more, until the function that it
// returns is called. The probes compare indices, and one that comes by the same name has another. The
// kernel may let who asks for an interface wait, so nobody else waits for that.
func watchLinks(links []namedLink, say *speaker) (stop func()) {
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(linkTick)
		defer tick.Stop()
		for len(links) > 0 {
			select {
			case <-ended:
				return
			case <-tick.C:
				links = slices.DeleteFunc(links, func(l namedLink) bool { return l.sayGone(say) })
			}
		}
	}()
	return func() {
		close(ended)
		<-done
	}
}

// sayGone says that the interface is gone, and tells whether it is. A namespace that is not found may only
// be one to which no way leads any more.
func (l *namedLink) sayGone(say *speaker) bool {
	_, err := l.ns.LinkName(l.link.Index)
	gone := errors.Is(err, unix.ENODEV)
	if gone {
		say.say("interface %q in %s is gone; packets of another one by that name are not shown, start nftrace anew for it",
			l.link.Name, nsNames([]*symbolize.Namespace{l.ns}))
	}
	return gone
}

func nsNames(list []*symbolize.Namespace) string {
	if len(list) == 1 && list[0].Name == "" {
		return "this network namespace"
	}
	s := ""
	for i, n := range list {
		if i > 0 {
			s += ", "
		}
		s += n.Name
	}
	return "namespace " + s
}
