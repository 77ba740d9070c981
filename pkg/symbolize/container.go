package symbolize

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Container is a running container, or a named network namespace that stands
// for one.
type Container struct {
	ID   string // "" for a named namespace
	Name string
	Pid  int // of its first process; 0 for a named namespace
	// Netns is where the container's processes run.
	Netns *Namespace
	// Veths are its interfaces with their ends outside.
	Veths []Veth
}

// Why a container could not be traced, for errors.Is.
var (
	ErrNoEngine    = errors.New("no container engine answers")
	ErrNoContainer = errors.New("no such container")
	ErrNotRunning  = errors.New("the container is not running")
	ErrNoNetwork   = errors.New("the container has no network of its own")
)

const (
	engineTimeout  = 5 * time.Second
	maxEngineReply = 16 << 20
)

// engineSockets returns where engines listen; dockerHost is DOCKER_HOST.
func engineSockets(dockerHost string) []string {
	usual := []string{"/var/run/docker.sock", "/run/podman/podman.sock"}
	if p, ok := strings.CutPrefix(dockerHost, "unix://"); ok && p != "" {
		return append([]string{p}, usual[1:]...)
	}
	return usual
}

// inspect is what GET /containers/NAME/json says, as far as we ask.
type inspect struct {
	ID    string `json:"Id"`
	Name  string
	State struct {
		Running bool
		Pid     int
	}
	HostConfig struct{ NetworkMode string }
}

// ResolveContainer finds a running container by name or id (or its start) with
// the engine's API. Where no engine has it, a network namespace of that name
// (ip netns) is taken: containers built by hand.
func (s *System) ResolveContainer(ctx context.Context, nameOrID string) (*Container, error) {
	if nameOrID == "" {
		return nil, errors.New("empty container name")
	}
	found, err := s.inspectAny(ctx, nameOrID)
	if errors.Is(err, ErrNoEngine) || errors.Is(err, ErrNoContainer) {
		if ns, nsErr := s.ResolveNetns(nameOrID); nsErr == nil && !strings.ContainsAny(nameOrID, "/:") {
			c := &Container{Name: nameOrID, Netns: ns}
			c.Veths, err = ns.Veths()
			return c, err
		}
	}
	if err != nil {
		return nil, err
	}
	c := &Container{ID: found.ID, Name: strings.TrimPrefix(found.Name, "/"), Pid: found.State.Pid}
	switch mode := found.HostConfig.NetworkMode; {
	case !found.State.Running || found.State.Pid <= 0:
		return nil, fmt.Errorf("%w: start %s first", ErrNotRunning, c.Name)
	case mode == "host":
		return nil, fmt.Errorf("%w: %s runs with network mode host; its packets are the host's, trace them without naming a container",
			ErrNoNetwork, c.Name)
	case mode == "none":
		return nil, fmt.Errorf("%w: %s runs with network mode none and has only a loopback; trace that with --netns pid:%d",
			ErrNoNetwork, c.Name, c.Pid)
	}
	if c.Netns, err = s.ResolveNetns(fmt.Sprintf("pid:%d", c.Pid)); err != nil {
		return nil, fmt.Errorf("container %s: %w", c.Name, err)
	}
	if c.Netns.Inode == s.own {
		return nil, fmt.Errorf("%w: %s shares the network of the host", ErrNoNetwork, c.Name)
	}
	s.learn(c.Netns.Inode, c.Name)
	c.Netns.Name = s.NetnsName(c.Netns.Inode)
	c.Veths, err = c.Netns.Veths()
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.Name, err)
	}
	return c, nil
}

// LearnContainers asks the engines for all running containers, so that
// NetnsName knows them. It is no error where there is no engine.
func (s *System) LearnContainers(ctx context.Context) error {
	var errs []error
	for _, socket := range s.Sockets {
		var list []struct {
			ID string `json:"Id"`
		}
		err := get(ctx, socket, "/containers/json", &list)
		if errors.Is(err, ErrNoEngine) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, l := range list {
			var i inspect
			if err := get(ctx, socket, "/containers/"+url.PathEscape(l.ID)+"/json", &i); err != nil {
				errs = append(errs, err)
				continue
			}
			if !i.State.Running || i.State.Pid <= 0 {
				continue
			}
			ns, err := s.ResolveNetns(fmt.Sprintf("pid:%d", i.State.Pid))
			if err == nil && ns.Inode != s.own {
				s.learn(ns.Inode, strings.TrimPrefix(i.Name, "/"))
			}
		}
	}
	return errors.Join(errs...)
}

// inspectAny asks one engine after the other.
func (s *System) inspectAny(ctx context.Context, nameOrID string) (*inspect, error) {
	answered := false
	var failed error
	for _, socket := range s.Sockets {
		var i inspect
		err := get(ctx, socket, "/containers/"+url.PathEscape(nameOrID)+"/json", &i)
		switch {
		case err == nil:
			return &i, nil
		case errors.Is(err, ErrNoContainer):
			answered = true
		case errors.Is(err, ErrNoEngine):
		default:
			failed = err
		}
	}
	switch {
	case failed != nil:
		return nil, failed
	case answered:
		return nil, fmt.Errorf("%w: %q", ErrNoContainer, nameOrID)
	}
	return nil, fmt.Errorf("%w: no Docker or Podman socket at %s: is the engine running? "+
		"A container's namespace can be given as --netns pid:N", ErrNoEngine, strings.Join(s.Sockets, ", "))
}

// get asks an engine and decodes its answer into v.
func get(ctx context.Context, socket, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine"+path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" && !errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("%w: %w", ErrNoEngine, err)
		}
		return fmt.Errorf("container engine at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxEngineReply))
	if err != nil {
		return fmt.Errorf("container engine at %s: %w", socket, err)
	}
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return ErrNoContainer
	case resp.StatusCode != http.StatusOK:
		var e struct{ Message string }
		_ = json.Unmarshal(body, &e) // without a message the status has to do
		return fmt.Errorf("container engine at %s: %s %s", socket, resp.Status, e.Message)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("container engine at %s: %w", socket, err)
	}
	return nil
}
